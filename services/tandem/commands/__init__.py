"""The subcommands of `tandem`, one module per command or per piece that they share.

Whatever imports Ray is imported inside the command that needs it, so that the others start at once.
"""
