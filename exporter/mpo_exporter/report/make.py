"""Makes a report: measures, writes both files, prints the table."""

from __future__ import annotations

from mpo_exporter.report.facts import Report
from mpo_exporter.report.folder import write
from mpo_exporter.report.gather import Job, gather
from mpo_exporter.report.page import page
from mpo_exporter.report.terminal import print_whole
from mpo_runtime.cli import console


def make_report(job: Job) -> Report:
    """Measures what the job says, and writes and prints the result.

    Raises:
        MpoError: as `gather` and `write` do.
    """
    with console.progress("report") as update:
        report = gather(job, update)
    write(job.folder, report, page(report))
    print_whole(report, job.folder)
    return report
