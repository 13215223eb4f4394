"""Does a vision transformer keep looking locally while it learns class after class, and does it pay?"""

__version__ = "0.1.0"
