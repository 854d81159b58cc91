"""Write data at each stop of a drill, and check at later stops that the server returns the data unchanged.

`mlflow_worker` is a process that writes and reads every kind of data that MLflow stores.
`worker_client` starts the worker process and sends requests to it.
`expected_writes` stores the data that each stop wrote, and compares this data with the data that a later stop reads.
"""
