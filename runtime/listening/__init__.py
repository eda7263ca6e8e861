"""From a microphone or recordings to turns: endpointing, and the loop that answers them.

Talks to a session; knows no backend.
"""
