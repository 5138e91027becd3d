"""Pure decisions: which rows form the next batch, for which lane, and when. No asyncio, threads, torch or clock."""
