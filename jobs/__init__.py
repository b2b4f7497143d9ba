"""One command each: parse, call, print."""
