"""The command `tiny-align`: the dispatcher, and the sub-commands of the runtime.

May import everything in the runtime; nothing imports a command.
"""
