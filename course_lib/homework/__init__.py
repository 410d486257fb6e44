"""Homework: checks that say what is probably wrong, and grading over nbgrader."""
