"""The commands align, enroll, eval and demo: their options, and what they print.

May import everything in align; nothing imports a command.
"""
