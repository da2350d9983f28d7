"""The command line. One verb is one file of this folder; files whose names begin with an underscore hold what verbs share.

A verb's file has `ORDER`, its place among the verbs, and one public function, whose signature is the verb's options and whose docstring is
its help. A file with several public functions is a verb with several parts (`finebits data check`), and its docstring is the help of the whole.
Verbs read a recipe and call one function of `finebits.job` each; nothing heavy is imported before a verb runs.
"""

from finebits.cli._command import main

__all__ = ["main"]
