package drive

// For tests of package drive_test.
var (
	CompareAndSet = compareAndSet
	TxnRevision   = txnRevision
)
