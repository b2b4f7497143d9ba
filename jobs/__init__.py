"""The commands, one file each: parse, call, print. What they share is in the folders; pipeline and model meet here."""
