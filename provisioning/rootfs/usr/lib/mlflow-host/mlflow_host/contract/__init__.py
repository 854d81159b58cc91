"""Formats and names that the machine, the Pulumi program and the scripts share.

This package imports only the standard library. infra/ and scripts/ may import this package, but no other package of
mlflow_host.
"""
