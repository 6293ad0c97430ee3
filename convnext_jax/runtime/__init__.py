"""The processes of a run: how they start, agree, stop, and what they run on. Nothing here knows about models."""
