"""Pure functions on arrays: each file holds an equation, its literal (naive) form, and its fast form."""
