"""The command line's: a file for each command. A command is parse, one call, echo; its docstring is its help.

Nothing heavy is imported at the top of these files, so that --help and wrong paths are answered at once.
"""
