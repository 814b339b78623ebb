-- Sealing and auditing are the operator's side: a gateway that is taken over can't say what has been looked at.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA farebox FROM PUBLIC;
REVOKE ALL ON farebox.seals, farebox.sealing, farebox.audit_marks, farebox.auditing FROM PUBLIC;
GRANT EXECUTE ON FUNCTION farebox.seal, farebox.audit_since_last, farebox.book_state
TO farebox_control;
GRANT SELECT ON farebox.seals TO farebox_control;
