"""The page, the tables and the figures that a run leaves."""

from cfusion.report.context import ReportContext
from cfusion.report.report_files import write_report

__all__ = ["ReportContext", "write_report"]
