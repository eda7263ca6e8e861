"""The commands align, enroll, eval and demo, and the functions behind them.

May import everything in align; nothing imports a command.
"""
