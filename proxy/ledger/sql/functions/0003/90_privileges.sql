REVOKE ALL ON FUNCTION farebox.extend_holds FROM PUBLIC;
GRANT EXECUTE ON FUNCTION farebox.extend_holds TO farebox_gateway;
