"""nbgrader's settings, for `course homework …` and for nbgrader's own commands and formgrader started in this folder."""

from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearOutput,
    DeduplicateIds,
    IgnorePattern,
    LimitOutput,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

from course_lib.homework.contained import Contained
from course_lib.homework.restore import RestoreCells, StudentSeed

c = get_config()  # noqa: F821 (traitlets defines it)

c.CourseDirectory.course_id = "fine-tuning"
c.Contained.timeout = 300  # seconds a cell
c.Contained.total_timeout = 600  # seconds a notebook
# What a cell writes to stderr would cost all its points, and tqdm, peft and warnings write there.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = "(?s).*"
# Deleted cells are put back before the copies of cells are told apart; a student's own seed after the locked cells are restored.
c.Autograde.sanitize_preprocessors = [
    RestoreCells,
    ClearOutput,
    DeduplicateIds,
    OverwriteKernelspec,
    OverwriteCells,
    StudentSeed,
    CheckCellMetadata,
]
c.Autograde.autograde_preprocessors = [
    Contained,
    IgnorePattern,
    ClearMetadataPreprocessor,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"course_homework", "kernelspec", "language_info"}
c.ClearSolutions.code_stub = {"python": "# your code here\nraise NotImplementedError()"}
c.ClearSolutions.text_stub = "*Your answer here.*"
