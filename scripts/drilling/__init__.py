"""Write data at each stop of a journey through several images, read it back at later stops, and compare.

mlflow_worker     process that writes and reads every kind of data that MLflow stores
worker_client     starts that process and sends it requests
expected_writes   the data of each stop, and the differences to the data that a later stop reads
"""
