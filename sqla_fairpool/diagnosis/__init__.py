"""Why a caller waits: what a time-out, a leak report and the log can tell."""
