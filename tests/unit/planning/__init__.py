"""The planner: layouts, memory and step time, and the search for the fastest."""
