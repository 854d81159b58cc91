"""Apply infra/ to the local cloud, with Pulumi's engine if Pulumi's CLI is installed, otherwise with our own engine.

Our engine is for machines without Pulumi's CLI. No Python, Debian or npm registry contains Pulumi's CLI. Its build
takes ten minutes, which is too long for a demo. `tests/rehearsal/test_engines_agree.py` compares the two engines.

The modules `resources` and `data_sources` contain the AWS calls of each type, for both engines. With Pulumi's engine,
`pulumi_cli` runs the CLI, and the CLI's plug-in `provider` makes the AWS calls. If `make prepare-tools` built the CLI,
`language_host` replaces Pulumi's language host. With our engine, `engine` makes the AWS calls, `program_runner` runs
the Pulumi program in rehearse.py's process, and `state` stores the result. Both engines use the modules `stack`,
`boot_wait` and `status`.
"""
