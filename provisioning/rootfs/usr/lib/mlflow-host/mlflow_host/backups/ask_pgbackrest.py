"""PostgreSQL's archive_command: names a segment to the archiving service, and ends well once that has it in the bucket.

Run by PostgreSQL as `python -I -S ask_pgbackrest.py pg_wal/…`, so it imports next to nothing. pgBackRest backs up only
where the command has its name in it.
"""

import socket
import sys

SOCKET = "/run/mlflow-host/backups/archive.sock"
SECONDS = 60


def main(segment: str) -> int:
    try:
        with socket.socket(socket.AF_UNIX) as service:
            service.settimeout(SECONDS)
            service.connect(SOCKET)
            service.sendall(f"{segment}\n".encode())
            answer = service.makefile("r").readline()
    except OSError as error:
        answer = f"the archiving service does not answer: {error}\n"
    if answer == "\n":
        return 0
    print(f"mlflow-host: {segment} is not archived: {answer.strip() or 'no answer'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
