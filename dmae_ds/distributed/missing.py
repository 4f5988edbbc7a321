"""Judge from all ranks' last reports which rank is missing (heartbeat.py). Pure functions of plain values."""

from __future__ import annotations

from dataclasses import dataclass

# Once a collective broke, a rank that is silent for so long is the cause. A living rank may miss a few beats
# during a long import.
GONE_S = 4.0
ABORTED = "aborted"  # by NCCL's watchdog, after a collective took too long


@dataclass(frozen=True)
class Report:
    """A rank's last report. All durations are seconds.

    silent_s: since the report, by the reader's clock
    idle_s: since the rank began what it is `doing`
    waits_s: how long it has been inside one collective
    broken: how a collective failed for it, "closed", "timed out" or ABORTED
    """

    rank: int
    host: str = "unknown host"
    step: int = 0
    doing: str = "starting"
    silent_s: float = 0.0
    idle_s: float = 0.0
    waits_s: float = 0.0
    broken: str = ""

    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def last(self) -> str:
        return f"its last report was step {self.step}, {self.doing}"


def judge(reports: list[Report], *, timeout_s: float) -> str | None:
    """Return who is missing and what is known of it, or None while no rank is."""
    if any(report.broken == ABORTED for report in reports):
        return _judge_after_abort(reports, timeout_s=timeout_s)
    broken = [report for report in reports if report.broken]
    quietest = max(
        (report for report in reports if not report.broken),
        key=lambda report: report.silent_s,
        default=broken[0] if broken else None,
    )
    if quietest.silent_s > (GONE_S if broken else timeout_s):
        return _silent(quietest)
    timed_out = any(report.broken == "timed out" for report in broken)
    waited_s = max(report.idle_s if report.broken == "timed out" else report.waits_s for report in reports)
    if waited_s <= timeout_s and not timed_out:
        return None
    return _is_stuck(_stuck(reports), f"others have waited {waited_s:.0f} s for it")


def is_victim(report: Report, *, killed_by: str, timeout_s: float) -> bool:
    """Whether a rank that is gone was aborted because it had waited too long for another one.

    killed_by: name of the signal that ended it
    """
    return killed_by == "SIGABRT" and report.idle_s > timeout_s


def judge_alone(zero: Report, own: Report, *, error: str, has_watchdog: bool, timeout_s: float) -> str:
    """Return who is missing once rank 0 is gone with the store: only its last report and the own are known.

    Every rank that is left judges so, and prints it.
    has_watchdog: whether rank 0 may have been aborted for its waiting
    """
    killed_by = "SIGABRT" if has_watchdog else ""
    if not is_victim(zero, killed_by=killed_by, timeout_s=timeout_s):
        return f"{zero.name()} is gone ({error}); {zero.last()}"
    if own.waits_s:
        return (
            f"{zero.name()} is gone after it waited {zero.idle_s:.0f} s for another rank, as {own.name()} "
            f"does ({error}); {zero.last()}"
        )
    return _is_stuck(own, f"{zero.name()} waited {zero.idle_s:.0f} s for it and is gone ({error})")


def _judge_after_abort(reports: list[Report], *, timeout_s: float) -> str:
    """Look for the rank that aborted ranks waited for.

    A rank that had waited too long before it fell silent was aborted too.
    """
    aborted = [
        report
        for report in reports
        if report.broken == ABORTED or (report.silent_s > GONE_S and report.idle_s > timeout_s)
    ]
    rest = [report for report in reports if report not in aborted]
    quietest = max(rest, key=lambda report: report.silent_s, default=None)
    if quietest is not None and quietest.silent_s > GONE_S:
        return _silent(quietest)
    first = aborted[0]
    waited = f"{first.name()} waited {first.idle_s:.0f} s for it and was aborted by its watchdog (SIGABRT)"
    at_work = [report for report in rest if not report.waits_s]
    return _is_stuck(_stuck(at_work) if at_work else _furthest_behind(reports), waited)


def _silent(report: Report) -> str:
    return f"{report.name()} has not reported for {report.silent_s:.0f} s; {report.last()}"


def _is_stuck(report: Report, waited: str) -> str:
    return f"{report.name()} is stuck: {waited}; {report.last()}, {report.idle_s:.0f} s ago"


def _stuck(reports: list[Report]) -> Report:
    """The rank that is not in a collective; if all are, the one furthest behind, which is in a wrong one."""
    at_work = [report for report in reports if not report.broken and not report.waits_s]
    if at_work:
        return max(at_work, key=lambda report: report.idle_s)
    return _furthest_behind(reports)


def _furthest_behind(reports: list[Report]) -> Report:
    return min(reports, key=lambda report: (report.step, -report.idle_s))
