"""`doctor`: is all there that the worker needs, and does it do its work?"""
