"""The paper, from training to report: what is trained, measured, gathered, judged and written."""
