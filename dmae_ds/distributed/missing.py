"""Judge from all ranks' last reports which rank is missing (heartbeat.py). Pure functions of plain values."""

from __future__ import annotations

from dataclasses import dataclass

# Once a collective broke, a rank that is silent for so long is the cause. A living rank may miss a few beats
# during a long import.
GONE_S = 4.0


@dataclass(frozen=True)
class Report:
    """A rank's last report. All durations are seconds.

    silent_s: since the report, by the reader's clock
    idle_s: since the rank began what it is `doing`
    waits_s: how long it has been inside one collective
    broken: how a collective failed for it, "closed" or "timed out"
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
    broken = [report for report in reports if report.broken]
    quietest = max(
        (report for report in reports if not report.broken),
        key=lambda report: report.silent_s,
        default=broken[0] if broken else None,
    )
    if quietest.silent_s > (GONE_S if broken else timeout_s):
        return f"{quietest.name()} has not reported for {quietest.silent_s:.0f} s; {quietest.last()}"
    timed_out = any(report.broken == "timed out" for report in broken)
    waited_s = max(report.idle_s if report.broken == "timed out" else report.waits_s for report in reports)
    if waited_s <= timeout_s and not timed_out:
        return None
    stuck = _stuck(reports)
    waited = f"others have waited {waited_s:.0f} s for it"
    return f"{stuck.name()} is stuck: {waited}; {stuck.last()}, {stuck.idle_s:.0f} s ago"


def _stuck(reports: list[Report]) -> Report:
    """The rank that is not in a collective; if all are, the one furthest behind, which is in a wrong one."""
    at_work = [report for report in reports if not report.broken and not report.waits_s]
    if at_work:
        return max(at_work, key=lambda report: report.idle_s)
    return min(reports, key=lambda report: (report.step, -report.idle_s))
