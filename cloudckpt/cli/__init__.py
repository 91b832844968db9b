"""The command line.

Law: data to stdout, talk to stderr; exit 0 done, 1 failed, 2 misused. A command's module is imported when it
is run, so that ``--help`` needs neither torch nor a client.
"""
