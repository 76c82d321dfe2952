"""Who is served when not all can be: deadlines, credits of tenants, lengths of answers, and forecasts. A policy composes these
accounts; none of them plans anything."""
