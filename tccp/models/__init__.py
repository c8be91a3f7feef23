"""Neural networks as plain torch modules. They do not depend on clip tables, noise schedules or training."""
