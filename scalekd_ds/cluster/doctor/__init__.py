"""What a job over several nodes needs, looked at before it starts: `launch/doctor.py --hostfile launch/hosts`."""
