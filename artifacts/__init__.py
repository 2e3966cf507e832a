"""What stages leave behind and how they say so: atomic files, run folders, ``done.json``, settings, errors for people.

The lowest room of the house: it imports none of the others.
"""
