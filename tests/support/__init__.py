"""What the tests of more than one folder use.  No test folder imports from another one."""
