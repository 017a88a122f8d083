"""What is measured, a module each: `measure(contest)` returns figures that JSON can hold,
`report(figures)` the Markdown of its section, and `plot(figures, axes)`, if it exists, draws them.
"""
