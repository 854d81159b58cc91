"""Formats and names shared by the machine, the Pulumi program and the scripts. Standard library only.

infra/ and scripts/ may import this package and no other of mlflow_host.
"""
