"""``icarus bench agents``: workflows of agents on several models, ICaRus and its peers beside each other over HTTP."""
