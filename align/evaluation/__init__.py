"""How good an alignment is: answers to speech against typed ones, and word error rates.

May import `data` and the runtime; knows no training.
"""
