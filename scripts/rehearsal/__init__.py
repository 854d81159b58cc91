"""Apply infra/ to the local cloud, with Pulumi's engine if its CLI is there, else with our own.

Our engine exists for machines without the CLI, which no Python, Debian or npm registry carries; building it takes ten
minutes, too long for a demo. `tests/rehearsal/test_engines_agree.py` compares the two engines.

`resources` and `data_sources` describe the AWS calls of each type, for both engines. Pulumi's engine calls them through
`provider` (a plug-in over gRPC), and `pulumi_cli` runs the CLI; `language_host` replaces the vendor's language host,
which a CLI built here lacks. Our engine is `engine`; `program_runner` runs the program in process, and `state` stores
the result. `stack`, `boot_wait` and `status` serve rehearse.py with either engine.
"""
