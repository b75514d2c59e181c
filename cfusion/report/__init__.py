"""Pages, tables and figures of finished runs."""

from cfusion.report.context import ReportContext
from cfusion.report.report_files import write_report

__all__ = ["ReportContext", "write_report"]
