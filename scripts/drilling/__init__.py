"""What a journey through several images writes, reads back and compares.

`stored` writes and reads everything MLflow stores, in a process of its own that `reader` owns; `ledger` remembers what
was written at each stop and finds what is missing or not as it was.
"""
