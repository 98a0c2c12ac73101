"""The section of a card that compares students with their teachers."""

from collections.abc import Callable

from hfkd.evaluation.teacher_report import THROUGHPUT_BATCH, NetworkReport, TeacherReport

from .data import CardData
from .markdown import table


_Row = tuple[str, Callable[[NetworkReport], float], Callable[[float], str]]
_ROWS: tuple[_Row, ...] = (
    ("Accuracy", lambda one: one.accuracy, "{:.4f}".format),
    ("Expected calibration error (15 bins)", lambda one: one.calibration_error, "{:.4f}".format),
    ("Parameters", lambda one: one.parameters, "{:,}".format),
    ("Million floating-point operations per image", lambda one: one.flops / 1e6, "{:,.2f}".format),
    ("Latency of one image (ms)", lambda one: 1e3 * one.latency_s, "{:.2f}".format),
    (f"Images per second, in batches of {THROUGHPUT_BATCH}", lambda one: one.images_per_second, "{:,.0f}".format),
)


def teacher_report(data: CardData) -> str:
    """Teachers and students side by side, and where there is one teacher the ratios to it."""
    report = data.teacher_report
    if report is None:
        return ""
    teachers = [f"Teacher{number}" for number in _numbers(len(report.teachers))]
    students = [f"Student{number}" for number in _numbers(len(report.students))]
    ratios = [f"{student} / teacher" for student in students] if len(teachers) == 1 else []
    rows = [(name, *_cells(report, value, text)) for name, value, text in _ROWS]
    for j, teacher in enumerate(teachers):
        agreed = [f"{agreement[j]:.4f}" for agreement in report.agreement]
        rows.append((f"Same first choice as {teacher.lower()}", *[""] * len(teachers), *agreed, *[""] * len(ratios)))
    return (
        f"Students and teachers on the {report.split} split ({report.images:,} images); times are medians, taken in "
        f"turn on the hardware below:\n\n{table(('', *teachers, *students, *ratios), rows)}"
    )


def _cells(
    report: TeacherReport, value: Callable[[NetworkReport], float], text: Callable[[float], str]
) -> tuple[str, ...]:
    networks = [value(one) for one in (*report.teachers, *report.students)]
    cells = [text(one) for one in networks]
    if len(report.teachers) == 1:
        teacher, *students = networks
        cells += [f"{student / teacher:.3g}" if teacher else "" for student in students]
    return tuple(cells)


def _numbers(count: int) -> list[str]:
    return [""] if count == 1 else [f" {number}" for number in range(count)]
