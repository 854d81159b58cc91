"""PostgreSQL's archive_command: send a segment's name to the archive service. The exit status is 0 if the service
reports that the segment is archived.

PostgreSQL runs this program for every segment, so the program imports few modules. The file's name contains the word
"pgbackrest", because pgBackRest takes base backups only if the archive_command contains this word.
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
            reply = service.makefile("r").readline()
    except OSError as error:
        reply = f"the archive service does not answer: {error}\n"
    if reply == "\n":
        return 0
    print(f"mlflow-host: {segment} is not archived: {reply.strip() or 'no reply'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
