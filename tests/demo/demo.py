"""The incident that jobwarden was made for, found, explained and cured, on this machine, in half a minute.

    demo.py [--check] JOBWARDEN

Starts an agent of its own (socket, state and port are its own too), a worker with a queue, and a command that leaves a
process behind. Every step is asserted; the first that is not as it should be ends the demo with status 1. Whatever
happens, also Ctrl-C, all that it started is ended. --check: the same without pauses for reading.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
SUDO = [] if os.geteuid() == 0 else ["sudo"]
# In the environment of all that the worker starts, so that nothing of it can hide from the clean-up.
MARK = f"JOBWARDEN_DEMO={os.getpid()}-{time.time_ns()}"
# What report.py gives its children; long enough for the tree before it to be shown.
PATIENCE = 5

CONFIG = """\
[zombies]
after = "2s"

[[job]]
name = "report"
match = { argv = 'report\\.py' }
zombie_after = "2s"
orphan_after = "2s"
"""


class Failed(Exception):
    """A step that did not go as it should."""


class Demo:
    def __init__(self, jobwarden: str, pauses: bool) -> None:
        self.jobwarden = jobwarden
        self.pauses = pauses
        self.folder = Path(tempfile.mkdtemp(prefix="jobwarden-demo-"))
        self.socket = str(self.folder / "jobwarden.sock")
        self.agent: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[str] | None = None
        self.number = 0

    # -- what the reader sees

    def step(self, title: str, *text: str) -> None:
        self.number += 1
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"\n{bold}{self.number}. {title}{plain}")
        for line in text:
            print(f"   {line}")
        print(flush=True)

    def pause(self, seconds: float = 1.5) -> None:
        if self.pauses:
            time.sleep(seconds)

    def show(self, *args: str) -> None:
        """Runs a jobwarden command as a person would and shows what it says."""
        print(f"   $ jobwarden {' '.join(args)}")
        done = subprocess.run(self.command(*args), capture_output=True, text=True, timeout=60, check=False)
        for line in (done.stdout + done.stderr).splitlines():
            print(f"   | {line}")
        print(flush=True)
        if done.returncode != 0:
            raise Failed(f"`jobwarden {' '.join(args)}` ended with status {done.returncode}")

    # -- asking the agent

    def command(self, *args: str) -> list[str]:
        return [*SUDO, self.jobwarden, "--socket", self.socket, *args]

    def ask(self, *args: str) -> dict[str, Any]:
        done = subprocess.run(
            self.command("--json", *args), capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise Failed(f"`jobwarden --json {' '.join(args)}` failed: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def family(self) -> list[dict[str, Any]]:
        """The worker and all that descend from it by lineage, the worker first."""
        assert self.worker is not None
        rows = {row["id"]: row for row in self.ask("tree", str(self.worker.pid), "--all")["processes"]}
        root = next((r for r in rows.values() if r["pid"] == self.worker.pid and r["state"] != "gone"), None)
        if root is None:
            return []
        found, queue = [], [root]
        while queue:
            row = queue.pop(0)
            found.append(row)
            queue.extend(rows[child] for child in row["children"] if child in rows)
        return found

    def firing(self, kind: str) -> dict[str, Any] | None:
        """The firing alert of a kind that is about this demo's processes."""
        assert self.worker is not None
        for alert in self.ask("alerts")["alerts"]:
            ours = alert["job_name"] == "report"
            if alert["kind"] == "zombie":
                ours = (alert["subject"] or {}).get("pid") == self.worker.pid
            if ours and alert["kind"] == kind and alert["state"] == "firing":
                return alert
        return None

    # -- the story

    def run(self) -> None:
        self.start_agent()
        self.start_worker()
        job, command, grandchild = self.before_the_timeout()
        zombie, orphan = self.after_the_timeout(command, grandchild, job)
        self.explain(command, grandchild, zombie, orphan)
        self.cure(job, grandchild)
        self.all_well()

    def start_agent(self) -> None:
        self.step(
            "An agent watches every process of this host",
            "Its config names one kind of job: whatever runs report.py. A zombie or an orphan of it is",
            "worth an alert after 2 seconds (30 would be usual).",
        )
        config = self.folder / "jobwarden.toml"
        config.write_text(CONFIG)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            listen = f"127.0.0.1:{probe.getsockname()[1]}"
        args = ["agent", "--no-pin", "--config", str(config), "--listen", listen]
        log = open(self.folder / "agent.log", "wb")
        # A process group of its own: Ctrl-C is for the demo, which then stops the agent in order.
        self.agent = subprocess.Popen(
            self.command(*args, "--state-dir", str(self.folder / "state")),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=os.setpgrp,
        )
        self.until("the agent is ready", lambda: self.ready(listen), 20)
        print(f"   It is ready: http://{listen}/metrics", flush=True)

    def ready(self, listen: str) -> bool:
        assert self.agent is not None
        if self.agent.poll() is not None:
            raise Failed(f"the agent ended with status {self.agent.returncode}:\n{self.log()}")
        try:
            with urllib.request.urlopen(f"http://{listen}/readyz", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        lines = (self.folder / "agent.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def start_worker(self) -> None:
        self.step(
            "A worker takes commands from its queue",
            "It runs each with Popen(command, stderr=PIPE), reads the errors to their end and waits for it.",
            "In the queue: a report, and after it `echo the next command`.",
        )
        key, _, value = MARK.partition("=")
        self.worker = subprocess.Popen(
            [sys.executable, "-u", str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=open(self.folder / "worker.log", "wb"),
            text=True,
            env={**os.environ, key: value},
            preexec_fn=os.setpgrp,
        )
        queue = self.worker.stdin
        assert queue is not None
        queue.write(f"{sys.executable} {HERE / 'report.py'} {PATIENCE}\necho the next command\n")
        queue.flush()
        self.until("the worker took the report", lambda: "took:" in self.said(), 10)

    def said(self) -> str:
        return (self.folder / "worker.log").read_text()

    def before_the_timeout(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        self.step(
            "The tree while all is well",
            "The report started a child, and that one a grandchild. They belong to one job.",
        )
        self.until("the worker's family is four processes", lambda: len(self.alive()) == 4, PATIENCE)
        worker, command, _, grandchild = self.alive()
        job = command["job"]
        self.expect(job is not None and grandchild["job"] == job, "all of the report's processes are in its job")
        self.expect(worker["job"] is None, "the worker itself is in no job")
        self.show("tree", str(worker["pid"]))
        self.show("jobs")
        return job, command, grandchild

    def alive(self) -> list[dict[str, Any]]:
        return [row for row in self.family() if row["state"] == "running"]

    def after_the_timeout(
        self, command: dict[str, Any], grandchild: dict[str, Any], job: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self.step(
            f"After {PATIENCE} seconds the report gives up",
            "It terminates its child, one process, and exits. The grandchild lives on.",
        )
        self.until("the command is a zombie", lambda: self.state(command) == "zombie", PATIENCE + 15)
        self.until("the grandchild is adopted", lambda: bool(self.row(grandchild).get("adopter")), 5)
        assert self.worker is not None
        self.show("tree", str(self.worker.pid))
        self.expect(self.row(grandchild)["orphan"], "the grandchild is an orphan")
        self.expect("done:" not in self.said(), "the worker hangs: it has not taken its next command")
        self.pause()

        self.step("Nobody has to find that out: two alerts fire")
        found: dict[str, dict[str, Any]] = {}
        for kind in ("zombie", "orphan"):
            self.until(f"the {kind} alert fires", lambda kind=kind: self.note(found, kind), 15)
        self.show("alerts")
        zombie, orphan = found["zombie"], found["orphan"]
        self.expect(zombie["subject"]["pid"] == self.worker.pid, "the zombie alert names the parent that does not reap")
        self.expect(orphan["job"] == job, "the orphan alert names the job")
        self.expect(orphan["subject"]["id"] == grandchild["id"], "and the process that was left behind")
        self.expect(orphan["subject"]["adopter"] is not None, "and who adopted it")
        self.pause()
        return zombie, orphan

    def note(self, found: dict[str, dict[str, Any]], kind: str) -> bool:
        alert = self.firing(kind)
        if alert is not None:
            found[kind] = alert
        return alert is not None

    def explain(
        self,
        command: dict[str, Any],
        grandchild: dict[str, Any],
        zombie: dict[str, Any],
        orphan: dict[str, Any],
    ) -> None:
        self.step("Why does the worker not reap it? This is what took a day with ps, lsof and gdb")
        cause = self.ask("why", command["id"])
        self.show("why", zombie["id"])
        self.expect(cause["verdict"] == "parent-blocked-on-pipe", f"verdict parent-blocked-on-pipe: {cause['verdict']}")
        holders = [e["process"]["pid"] for e in cause["evidence"] if e["kind"] == "holder"]
        self.expect(grandchild["pid"] in holders, "the one that holds the pipe is the orphan")
        self.show("why", orphan["id"])
        verdict = self.ask("why", grandchild["id"])["verdict"]
        self.expect(verdict == "parent-killed", f"the orphan's verdict is parent-killed: {verdict}")
        self.pause()

    def cure(self, job: str, grandchild: dict[str, Any]) -> None:
        self.step(
            "The cure: end what is left of the job, not the worker",
            "SIGTERM first; it is ignored, so SIGKILL a second later.",
        )
        self.show("kill", job, "--orphans", "--grace", "1s")
        self.until("the grandchild is gone", lambda: self.state(grandchild) in ("zombie", "gone"), 5)

    def all_well(self) -> None:
        self.step("The worker reads the end of its pipe, reaps the report and takes the next command")
        self.until("the worker took its next command", lambda: self.said().count("done:") == 2, 10)
        for line in self.said().splitlines():
            print(f"   worker | {line}")
        quiet = lambda: self.firing("zombie") is None and self.firing("orphan") is None  # noqa: E731
        self.until("both alerts are resolved", quiet, 15)
        print("\n   Both alerts are resolved.")
        self.show("alerts", "--history")

    # -- small things

    def row(self, process: dict[str, Any]) -> dict[str, Any]:
        """The process as it is now; empty when the tree has forgotten it."""
        return next((r for r in self.family() if r["id"] == process["id"]), {})

    def state(self, process: dict[str, Any]) -> str:
        return self.row(process).get("state", "gone")

    def until(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise Failed(f"within {seconds:.0f} s it did not come about that {what}")
            time.sleep(0.1)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise Failed(f"this should hold and does not: {what}")
        print(f"   ok: {what}", flush=True)

    def clean_up(self) -> None:
        # The marked ones are all that the worker started, wherever they were adopted; twice, since one may
        # have forked while the first round read.
        for _ in range(2):
            for pid in marked():
                end(pid)
        if self.worker is not None:
            self.worker.wait()
        if self.agent is not None and self.agent.poll() is None:
            subprocess.run([*SUDO, "kill", "-TERM", str(self.agent.pid)], check=False)
            try:
                self.agent.wait(10)
            except subprocess.TimeoutExpired:
                subprocess.run([*SUDO, "kill", "-KILL", str(self.agent.pid)], check=False)
                self.agent.wait()
        if SUDO:
            subprocess.run([*SUDO, "rm", "-rf", str(self.folder)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def marked() -> list[int]:
    """The processes that carry this demo's mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def end(pid: int) -> None:
    """SIGKILL through a pidfd that is opened before the mark is looked at again: never a successor of the pid."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(handle)


def interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="The incident, found, explained and cured.")
    parser.add_argument("--check", action="store_true", help="no pauses for reading")
    parser.add_argument("jobwarden", help="the program")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    demo = Demo(args.jobwarden, pauses=not args.check)
    try:
        demo.run()
    except Failed as failed:
        print(f"\nFAILED: {failed}\n\nThe agent's last lines:\n{demo.log()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: cleaning up", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        demo.clean_up()
    print("\nThat is what jobwarden does. All that this demo started is gone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
