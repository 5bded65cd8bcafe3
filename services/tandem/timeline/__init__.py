"""What ran where and when, and the pictures of it: shared by the simulator and the live cluster.

Pure: events come with their times, whatever the clock. Recording in a live process is
`tandem.tracing`'s.
"""
