"""The worker of the incident: takes commands from a queue, one a line, and runs each to its end.

It is written as many are. The mistake is one line: `stderr.read()` waits for the end of the file, and that comes only when
*every* process that holds the pipe's write end is gone, not when the command is.
"""

import shlex
import subprocess
import sys


def main() -> None:
    while command := sys.stdin.readline():
        print(f"took: {command.strip()}", flush=True)
        process = subprocess.Popen(shlex.split(command), stderr=subprocess.PIPE)
        errors = process.stderr.read()
        status = process.wait()
        print(f"done: status {status}, {len(errors)} bytes of errors", flush=True)


if __name__ == "__main__":
    main()
