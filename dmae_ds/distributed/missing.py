"""Who is missing, judged from what every rank said last (heartbeat.py). Pure."""

from __future__ import annotations

from dataclasses import dataclass

GONE_S = 4.0  # a collective broke: whoever is silent for so long is the cause. A living rank may miss a few beats in a long import


@dataclass(frozen=True)
class Report:
    """What a rank said last. All durations are seconds.

    silent_s: since then, by the reader's clock; idle_s: since it began what it is `doing`
    waits_s: how long it stands in one collective; broken: how a collective failed in its hands, "closed" or "timed out"
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
    """The verdict over all ranks' reports: who is missing and what is known of it; None while nobody is."""
    broken = [report for report in reports if report.broken]
    quietest = max(
        (report for report in reports if not report.broken),
        key=lambda report: report.silent_s,
        default=broken[0] if broken else None,
    )
    if quietest.silent_s > (GONE_S if broken else timeout_s):
        return f"{quietest.name()} has not been heard of for {quietest.silent_s:.0f} s; {quietest.last()}"
    waited_s = max(report.idle_s if report.broken == "timed out" else report.waits_s for report in reports)
    if waited_s > timeout_s or any(report.broken == "timed out" for report in broken):
        at_work = [report for report in reports if not report.broken and not report.waits_s]
        # Where all of them wait, whoever is furthest behind waits in the wrong place.
        stuck = (
            max(at_work, key=lambda report: report.idle_s)
            if at_work
            else min(reports, key=lambda report: (report.step, -report.idle_s))
        )
        return f"{stuck.name()} is stuck: others have waited {waited_s:.0f} s for it; {stuck.last()}, {stuck.idle_s:.0f} s ago"
    return None
