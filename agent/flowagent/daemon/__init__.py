"""The agent: claims runs, renews leases, supervises attempts, ships output, drains."""
