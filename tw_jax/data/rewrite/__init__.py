"""Stage 1 of the data: sequential traces of thought rewritten with parallel blocks by an LLM.

The LLM only says where structure is, in line numbers, and proposes small replacements and plans.
What becomes of a trace is decided here, by pure functions, and checked line by line.
"""
