"""Runs a Pulumi program in process and applies what it registers to an AWS endpoint, in Pulumi's own order.

`program` runs the program, `engine` decides and applies, `resources` and `lookups` know the AWS calls, `state`
remembers; `stack`, `boot` and `status` are what `rehearse.py` does with them.
"""
