"""The command of the incident: hands its work to children, waits for a while, and then ends *one* of them.

    report.py SECONDS        the time it gives its children
"""

import multiprocessing
import signal
import sys
import time


def render() -> None:
    """The grandchild: deaf to SIGTERM, as a program is that wants to finish its page first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def collect() -> None:
    """The child: starts the grandchild and waits for it."""
    page = multiprocessing.get_context("fork").Process(target=render)
    page.start()
    page.join()


def main() -> None:
    child = multiprocessing.get_context("fork").Process(target=collect)
    child.start()
    child.join(timeout=float(sys.argv[1]))
    if child.is_alive():
        child.terminate()
        child.join()
    sys.exit(1)


if __name__ == "__main__":
    main()
