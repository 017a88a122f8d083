"""What is measured, a module each: `measure(contest)` gives figures that JSON can hold,
`report(figures)` the Markdown of its section, and, where there is one, `plot(figures, axes)` draws.
"""
